"""Labels clips from a handful of examples of each class; nothing is trained."""
