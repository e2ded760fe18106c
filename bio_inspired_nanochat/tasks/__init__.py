"""Problems to train and measure models on."""
