"""What several tests share: small federations, recorded runs, processes that are watched and killed."""
