"""What came out of a cell: records, their checksums, sizes, copies to trackers."""
