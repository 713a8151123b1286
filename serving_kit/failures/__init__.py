"""What follows a failure: pure decisions."""
