"""`deploy/test-hosts`: training across several hosts, one of which is cut off."""
