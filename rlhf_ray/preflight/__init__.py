"""What can be known to go wrong before anything is started. Nothing here is needed by a run."""
