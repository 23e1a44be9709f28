"""The teacher-logit store: a codec for blocks of targets, and the folder that holds them."""
