"""What a kind of model is calibrated on and measured by: language, vision."""
