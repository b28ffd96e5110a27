"""`deploy/test-hosts`: a test that trains across several hosts and cuts one of them off."""
