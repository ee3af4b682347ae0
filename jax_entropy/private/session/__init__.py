"""A private model at work: text token by token, all parties in one process or each in its own."""
