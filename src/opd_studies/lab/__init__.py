"""What trains and measures the models of studies."""
