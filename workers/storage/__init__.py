"""The storage root: objects in a folder or a bucket, receipts, arrays."""
