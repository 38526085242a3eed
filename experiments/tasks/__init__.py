"""Tasks that models are trained and tested on."""
