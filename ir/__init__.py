"""What does this program mean? Capture, normal form, patterns, and ops with reference semantics."""
