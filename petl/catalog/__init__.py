"""What `petl methods` and `petl show` print: methods, their fields, and what they support."""
