"""Changes between the two factors of a site, of no influence on their product. One file an answer."""
