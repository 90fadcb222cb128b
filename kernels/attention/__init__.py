"""What the attention ops share: reading masks, softmax, the rows of the observation window."""
