"""The last step of the recipe: a cut model is trained to predict what the dense model predicts."""
