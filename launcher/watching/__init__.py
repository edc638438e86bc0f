"""What runs and their jobs are doing, and what they say."""
