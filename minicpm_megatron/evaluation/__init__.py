"""What a trained model can do, measured from any folder that can be converted."""
