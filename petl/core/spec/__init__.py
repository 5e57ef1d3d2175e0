"""What a method declares: config fields, the registry's record, capabilities, extra losses."""
