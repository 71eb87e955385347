"""Does pre-training pay with few labels? Arms x seeds x segmenters on one data set, and the tables and figures."""
