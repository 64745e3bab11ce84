# For login shells, whose /etc/profile sets PATH anew. KubeRay before 1.4 starts Ray by one.
PATH=/opt/vnet/bin:$PATH
