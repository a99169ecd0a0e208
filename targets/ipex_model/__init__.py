"""What the IPEX target is made of: which layers are quantized how, their scales in IPEX's hands, and TorchScript with its weights."""
