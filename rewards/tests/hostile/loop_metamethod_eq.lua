-- may end in: timeout instructions runtime
function reward(sample, ctx)
  if sample.completion == "bad" then
    do local m = {} m.__eq = function(a, b) return a == b end return setmetatable({}, m) == setmetatable({}, m) end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
