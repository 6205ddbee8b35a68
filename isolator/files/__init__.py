"""Files inside an agent's mounts, done on the host with the box's own rights."""
