"""A checksum accelerator as an mdevkit parent. The entry point is `mdevkit_acme.parent:AcmeParent`."""
