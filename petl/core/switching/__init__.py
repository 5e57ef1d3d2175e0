"""Adding, switching, loading and deleting among many adapters of one model."""
