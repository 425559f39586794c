"""The drop-in promise on whole models of other libraries, with random weights and without a network."""
