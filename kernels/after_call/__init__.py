"""What happens to slots when a call is over, outside its graph."""
