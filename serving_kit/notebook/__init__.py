"""What a server shows and changes in a notebook's kernel."""
