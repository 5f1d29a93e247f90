"""Relief inside the training loops of other libraries, which are imported only where they are used."""
