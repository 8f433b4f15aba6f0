"""The command line, launchers, the training job and churn."""
