"""One pass over a set of images: each batch becomes features once, for all metrics."""
