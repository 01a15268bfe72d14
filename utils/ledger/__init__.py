"""What the notebooks conclude: claims, the rules that judge them, the table, the files."""
