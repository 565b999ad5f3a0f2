# What the token of a replica may do: keep itself in its pool, see the others, read its orders.
# consul acl policy create -name pingjia -rules @deploy/consul/policy.hcl
service_prefix "pingjia" {
  policy = "write"
}
node_prefix "" {
  policy = "read"
}
# An operator's token (drain, rollout) needs "write" here; a replica deletes its own orders when it leaves.
key_prefix "pingjia/" {
  policy = "write"
}
