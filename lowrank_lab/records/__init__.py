"""The results of cells: records, their checksums, sizes of models, copies for trackers."""
