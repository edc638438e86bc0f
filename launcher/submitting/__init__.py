"""`llmtrain submit`: what is asked for -> jobs in the queue."""
