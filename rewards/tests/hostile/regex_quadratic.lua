-- may end in: timeout instructions runtime
function reward(sample, ctx)
  if sample.completion == "bad" then
    do return rft.regex.count(string.rep("A", 400000), ".*[^A-Z]|[A-Z]") end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
