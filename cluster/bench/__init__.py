"""`ballonet bench`: measures a running server as its clients see it. Loads nothing by itself."""
