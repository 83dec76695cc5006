"""What preference data and reward models are worth: evaluation, findings, release gate."""
