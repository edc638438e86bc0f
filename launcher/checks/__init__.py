"""What would fail, found before anything is queued."""
