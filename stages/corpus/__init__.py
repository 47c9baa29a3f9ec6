"""Raw records to tokenised samples."""
