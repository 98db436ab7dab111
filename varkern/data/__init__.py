"""Images to train and measure on: settings, folders and data sets, their order and their split."""
