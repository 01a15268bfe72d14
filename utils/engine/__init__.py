"""Running again only what an intervention can change: what makes a sweep fast."""
