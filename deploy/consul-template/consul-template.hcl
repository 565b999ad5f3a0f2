# consul-template -config deploy/consul-template/consul-template.hcl
consul {
  address = "127.0.0.1:8500" # token: CONSUL_HTTP_TOKEN
  retry {
    enabled  = true
    attempts = 0 # for ever: while Consul is away, nginx keeps what it has
  }
}

template {
  source      = "deploy/consul-template/pingjia.conf.ctmpl"
  destination = "/etc/nginx/conf.d/pingjia.conf"
  perms       = 0644
  backup      = true
  wait {
    min = "1s"
    max = "5s"
  }
  exec {
    # A file that nginx refuses is put back before anything reloads it.
    command = ["sh", "-c", "nginx -t -q && nginx -s reload || { cp /etc/nginx/conf.d/pingjia.conf.bak /etc/nginx/conf.d/pingjia.conf; exit 1; }"]
  }
}
