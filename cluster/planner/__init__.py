"""`ballonet simulate`: what a deployment would do with a load, before there is a GPU to try it on."""
