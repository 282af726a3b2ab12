"""Learning: data, trainers and evaluation for both modes of A.X K1. Import from the modules themselves."""
