"""Does pre-training pay with few labels? Arms x seeds x segmenters on one dataset, and the tables and figures."""
