"""What the OpenVINO target is made of."""
