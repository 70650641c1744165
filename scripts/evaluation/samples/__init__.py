"""What generated volumes are worth: they are measured beside real volumes and beside Gaussians."""
