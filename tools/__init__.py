"""Programs around the package: what moves models in and out of it."""
