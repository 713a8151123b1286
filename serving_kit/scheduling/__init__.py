"""What runs next: pure decisions of explicit time."""
