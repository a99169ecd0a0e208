"""The targets of graphprune, one file each; ``__all__`` is what the registry finds."""



__all__ = []
