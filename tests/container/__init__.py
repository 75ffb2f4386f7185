"""Test of the container image, which needs Docker or Podman."""
